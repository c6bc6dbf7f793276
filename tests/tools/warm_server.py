"""Imported by the server of `processes`, after the libraries."""

import warm

warm.warm_up()
