"""Dictionary kinds, one file each: settings, mathematics and special initialisers."""
