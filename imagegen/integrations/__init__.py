"""Adapters to other projects, each imported where it is used."""
