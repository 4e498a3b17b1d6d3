"""One process serving one domain: it maps the backbone and runs the engine."""
