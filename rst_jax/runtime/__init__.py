"""The machine: devices and processes, stopping, files, workdirs."""
