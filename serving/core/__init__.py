"""Pure decisions and codecs: no I/O, no clock, no framework."""
