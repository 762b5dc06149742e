"""The verbs that are loaded when they are typed; each module holds one click command."""
