"""From records of single requests to what can be said of a run, and how sure it is."""
