"""DVC's stages: the project's own tables, made of pinned sources."""
