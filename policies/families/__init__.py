"""One page a model family; policies.registry finds POLICY in every module here."""
