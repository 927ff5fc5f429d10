"""Which rows of a pool to train on: the rooms of data_builders.select.

`sources` reads rows and their vectors (`vectors`), `clusters` and `density` group them by meaning, `quota` and
`proximity` say how many of which, `drawing` draws within bounds; `report`, `picture` and `distances` show
what came of it.
"""
