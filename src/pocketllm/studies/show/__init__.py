"""Presentation of results: prose from Markdown templates, tables, pictures, the page of a study."""
