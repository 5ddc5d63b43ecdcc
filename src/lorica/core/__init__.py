"""The vocabulary that every layer shares: errors, config, sites, updates. Knows no model, file format or user."""
