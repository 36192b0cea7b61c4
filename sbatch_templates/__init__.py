"""The batch scripts, as jinja2 templates."""
