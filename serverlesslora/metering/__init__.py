"""Who used what: a ledger of requests and of memory held, prices for it, budgets against it."""
