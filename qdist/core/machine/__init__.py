"""Cards, cluster and what was measured of them, as data."""
