"""How attention is computed: the definition, the back-ends, and who serves what."""
