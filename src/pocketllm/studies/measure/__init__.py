"""Measurement of the claims: the steps of each study, and their common parts."""
