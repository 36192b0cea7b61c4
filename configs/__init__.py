"""The default configuration: each YAML file here may be overlaid by a site's own."""
