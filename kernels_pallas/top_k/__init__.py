"""The largest values of each row of a long array."""
