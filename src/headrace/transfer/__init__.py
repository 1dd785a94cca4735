"""L2, moving KV between instances: who sends which runs, how a target knows that all has landed, when memory is free again."""
