"""The cells of a comparison as tasks, here or on other machines."""
