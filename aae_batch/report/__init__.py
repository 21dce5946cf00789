"""The report page and the contact sheet."""
