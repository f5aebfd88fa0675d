"""The core in Amaranth, unit by unit; `core.Core` puts them together. Needs the extra `hardware`."""
