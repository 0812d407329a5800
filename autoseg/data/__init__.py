"""Files to arrays and back: volumes, label maps, datalists, phantoms."""
