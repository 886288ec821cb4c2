"""Whether prepared data is what its manifests say."""
