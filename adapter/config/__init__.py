"""The YAML file: its schema, its loader, the files it names."""
