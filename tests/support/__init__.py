"""Helpers of the tests; nothing here is imported by the product."""
