"""The fault matrix: named faults, each tried on the real app, with what they cost.

`nox -s faults` runs all of them and prints one table. `nox -s faults -- B C4 link_cut` runs those
of a group, of an entry such as S2 or C4, or with a name. The results are also written to
`.benchmarks/faults.json` and `.benchmarks/faults.md`.

    matrix.py       a fault, its outcome, the runner and the table
    wire.py         a federation in one process; all messages pass through Flower's serialization
    runs.py         small runs of the app on this federation, and the undisturbed runs
    contract.py     names of the app's policy and state that the faults rely on
    by_server.py    group A: what a server asks of a client
    by_client.py    group B: what a client answers
    accidents.py    group C: damaged files, power cuts, full disks
    network.py      group network: real processes on this machine
    processes.py    a SuperLink and SuperNodes whose processes and links can be hurt
"""
