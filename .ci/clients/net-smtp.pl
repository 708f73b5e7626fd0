#!/usr/bin/env perl
# PORT MAILS FILE
use strict;
use Net::SMTP;
use Time::HiRes 'time';
my ($port, $mails, $file) = @ARGV;
open my $handle, '<:raw', $file or die $!;
my $body = do { local $/; <$handle> };
my $smtp = Net::SMTP->new('127.0.0.1', Port => $port) or die $@;
while ($mails--) {
    my $begin = time;
    $smtp->mail('from@bench.test') && $smtp->to('to@bench.test') && $smtp->data("Subject: x\n\n$body") or die $smtp->message;
    print 1000 * (time - $begin), "\n";
}
$smtp->quit;
