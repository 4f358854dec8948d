# Starts so many processes of a command by the mpirun of this host, whichever it is: $1 is how many, $2 is what bash runs in each, or sh in an
# image without. The agent reads this in, and a rank's environment comes from its own host: nothing of it is on a command line. It keeps no
# variables, as ranks on this host would have the job's own of that name with its values.
if ! command -v mpirun >/dev/null; then
    echo "batchai: there is no mpirun on the PATH of this node ($PATH); install Open MPI, MPICH or Intel MPI, or set PATH in the job's environment variables" >&2
    exit 127
fi
# Ranks have sockets for their standard input with some of them, and bash would take itself for one that somebody logged in by.
if [ -x /bin/bash ]; then set -- "$1" /bin/bash --norc -c "$2"; else set -- "$1" /bin/sh -c "$2"; fi
case $(mpirun --version 2>&1 </dev/null) in
*"Open MPI"* | *OpenRTE* | *PRRTE*)
    set -- --map-by slot --bind-to none --wdir / -n "$@"
    if [ "${EUID:-$(id -u)}" = 0 ]; then set -- --allow-run-as-root "$@"; fi
    exec mpirun --hostfile "$AZ_BATCHAI_MPI_HOST_FILE" "$@"
    ;;
*Intel* | *HYDRA* | *Hydra* | *MPICH* | *MVAPICH*)
    # The others come back to this host by its address: its name may be known to nobody.
    exec mpirun -machinefile "${AZ_BATCHAI_MPI_HOST_FILE%/*}/.hostfile.hydra" -localhost "$MASTER_ADDR" -genvnone -wdir / -n "$@"
    ;;
esac
printf 'batchai: %s is none of Open MPI, MPICH and Intel MPI; it calls itself: %.500s\n' "$(command -v mpirun)" "$(mpirun --version 2>&1 </dev/null)" >&2
exit 126
