"""Group A, entry S0: who is shut out of a deployment with TLS, authentication and a proxy.

A fault here starts the deployment that the README recommends, and then a SuperNode with an unknown
key, one without TLS, a run submitted from outside, or a FAB that is not on the list:

    @fault("A", "S0", "it cannot join, and the run completes without it")
    def supernode_with_an_unknown_key(directory: Path) -> Outcome:
        \"\"\"A SuperNode has a key that is not registered.\"\"\"
        ...
        return same_result("refused: …", finished, undisturbed(...))
"""
