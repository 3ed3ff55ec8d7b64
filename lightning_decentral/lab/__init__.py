"""Equipment for experiments on this package: emulated hosts, races, benchmarks. Nothing else imports it."""
