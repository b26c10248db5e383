"""One self-contained HTML file that shows runs, or an experiment; and a page for a blinded comparison of pictures."""
