"""Configurations: Python files with one `get_config`; they import nothing from the package."""
