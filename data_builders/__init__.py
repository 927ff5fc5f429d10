"""Jobs that turn rows into rows."""
