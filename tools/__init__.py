"""What inspects builds of this package: ahead-of-time compilation, machine code, sanitizers, versions, mutations."""
