/* Reads its input to the end.  It has no start of the C library, which asks for the features of the processor: on a
   virtual machine, where each such question is one to the hypervisor, that took twice as long as all the rest. */
#include <sys/syscall.h>
#include <unistd.h>

void _start(void) {
    static char buffer[65536];
    while (syscall(SYS_read, 0, buffer, sizeof buffer) > 0);
    syscall(SYS_exit_group, 0);
    __builtin_unreachable();
}
