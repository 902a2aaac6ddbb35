"""The doors between stages: a table and its expectations, one file per door."""
