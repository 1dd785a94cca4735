"""Seeds that found something, with what it was. They run with every test; a change of the scenarios may make them tamer, never wrong."""

REGRESSIONS = {
    4: "an instance closed a sequence before it had sent the tokens that it drew last",
    11: "a preempted sequence's last draw was counted by the executor and not by the core",
    18: "a holder that had obeyed one forced stop was never asked for a second: the first in line waited for ever",
    50: "a handover of a sequence without published blocks left an empty handle that nobody released",
    98: "a pool that heard of a death later than a peer's `Quiet` kept the quarantine for ever",
    210: "two instances of one small pool stopped each other in turn: leases are served by age of request now",
    216: "a window group of which a hit needs no block took unwritten blocks for covered ones, and published them",
    327: "second copies of indexed blocks pinned the first ones: one sequence could fill its pool twice",
    353: "a waiting sequence's locked prefix kept what the first in line waited for",
    386: "a prefix look-up met a handle that an empty handover had left",
    828: "room that a target made for a moving sequence came in the instant in which the sequence ended",
    939: "a source kept what it had sent to a target that then died: the last acknowledgement came after the death",
    1213: "a `Quiet` came before its pool had even heard of the birth of the one that died",
    1252: "blocks freed by a stop at the end of a settle were not given to those that waited until something else happened",
    1434: "giving up locks that others share freed nothing, and the pool did not say so: the next victim was never chosen",
    1990: "shortage in one group starved holders that lacked blocks of another group only",
    26972: "a choice used up its attempts on a dead instance that the router had not heard of yet",
    27538: "a stopped sequence without published blocks gave too little, and the instance never asked again",
    39156: "a holder that was forced, then first, then behind again was not forced again",
}
