"""Where a base model comes from: a hub, a folder, pinned packages."""
