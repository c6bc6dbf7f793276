"""Write a report in a format. A writer knows tables and text, and no run folder."""
