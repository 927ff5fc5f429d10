"""E-commerce instructions: tables of products, reviews, pairs and queries, worded as tasks of twelve families.

`tables` reads, `families` says which task needs what, `products`, `matches` and `arithmetic` make the tasks,
`wordings` has their words in each language, `drafts` draws, and `rewriting`, `reasoning` and `agents` ask models.
"""
