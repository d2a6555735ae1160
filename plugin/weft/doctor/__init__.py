"""`weft doctor`: what hosts know of themselves and measured of each other, and what is wrong with it by its root."""
