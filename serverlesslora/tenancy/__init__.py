"""Who may ask for what: API keys, the tenants they speak for, and what each key may take. Knows nothing of HTTP."""
