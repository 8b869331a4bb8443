"""The report page: one self-contained HTML file about a folder of results, from its tables alone."""
