"""The wire of the Tinker protocol: protobuf and JSON on one side, the engine's commands on the other."""
