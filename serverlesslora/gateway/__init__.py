"""The HTTP process: routes, registry, and the fleet of workers it commands; never imports torch."""
