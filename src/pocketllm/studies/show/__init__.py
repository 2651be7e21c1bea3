"""How results are shown: prose from Markdown templates, tables, pictures, the page of a study."""
