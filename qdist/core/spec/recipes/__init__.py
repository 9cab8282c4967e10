"""Recipes of other programs: what each of their keys is here, one file a program."""
