"""All decoder layers as one operation."""
