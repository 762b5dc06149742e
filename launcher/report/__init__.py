"""For people: terminal tables and pages."""
