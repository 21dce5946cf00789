"""How the embedded model was trained and scored. Not part of the package, which never imports it."""
