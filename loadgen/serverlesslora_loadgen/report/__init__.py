"""What people look at after a run: one HTML file that needs no network, and a summary in Markdown."""
