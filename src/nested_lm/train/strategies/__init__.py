"""How one model is spread over devices."""
