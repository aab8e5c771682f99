"""The laboratory: suites, campaigns, audits and reports. It builds on nested_lm, which never imports it."""
